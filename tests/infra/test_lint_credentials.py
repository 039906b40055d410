"""infra.lint.credentials: text that looks like a credential is found, text that only names one is not."""

from pathlib import Path

import pytest

from infra.lint import credentials
from infra.lint.tree import Tree

# Put together here, so that this file has none itself.
AWS_KEY = "AKIA" + "IOSFODNN7" + "QWERTYU"
PRIVATE_KEY = "-----BEGIN " + "OPENSSH PRIVATE KEY-----"
# Put together here: the check would find a literal, and a random one differs between processes.
HEXADECIMAL = "".join(f"{7 * number % 16:x}" for number in range(64))
WORD = "hunter" + "2-and-more"


def scanned(tmp_path: Path, name: str, text: str) -> list[tuple[int, str]]:
    """Return (line, message) of each problem of a file with this text."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
    return [(problem.line, problem.what) for problem in credentials.credentials(Tree(tmp_path)).problems]


@pytest.mark.parametrize(
    ("name", "line", "kind"),
    [
        ("a.py", f'key = "{AWS_KEY}"', "an AWS access key"),
        ("README.md", f"export AWS_ACCESS_KEY_ID={AWS_KEY}", "an AWS access key"),
        ("id_ed25519", PRIVATE_KEY, "a private key"),
        ("a.md", "gh" + "p_" + "a1B2" * 9, "a GitHub token"),
        ("a.py", f'connect("postgres://mlflow:{WORD}@db/mlflow")', "a URL with a password"),
        ("a.yaml", f"  password: {WORD}", "a secret given as it is"),
        ("a.yaml", f"RAY_AUTH_TOKEN: '{WORD}'", "a secret given as it is"),
        ("a.env", f"export ADMIN_PASSWORD={WORD}", "a secret given as it is"),
        ("a.py", f'admin_password = "{WORD}"', "a secret given as it is"),
        ("a.tfvars", f'secret_access_key = "{WORD}"', "a secret given as it is"),
        ("a.sh", f"curl -H 'token {HEXADECIMAL}'", "random letters beside the word for a secret"),
    ],
)
def test_a_credential_is_found(tmp_path: Path, name: str, line: str, kind: str) -> None:
    assert [(line, what.startswith(f"looks like {kind}")) for line, what in scanned(tmp_path, name, f"\n{line}\n")] == [
        (2, True)
    ]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.py", "token = secrets.token_hex(32)"),
        ("a.py", 'password = os.environ["PASSWORD"]'),
        ("a.py", "def login(token: str) -> None:"),
        ("a.py", f'digest = "{HEXADECIMAL}"'),
        ("a.yaml", "password: ${PASSWORD:?needed}"),
        ("a.yaml", "token: !vault it"),
        ("a.yaml", "  ~/.ray/auth_token: ~/.ray/auth_token"),
        ("a.yaml", "secretName: redis-password"),
        ("a.yaml", "password: changeme-please"),
        ("a.yaml", "automountServiceAccountToken: false"),
        ("a.yaml", "RAY_AUTH_TOKEN_PATH: /run/secrets/ray_token"),
        ("a.service", "LoadCredential=admin_password:/etc/mlflow/secrets/admin_password"),
        ("a.md", "postgres://USER:PASSWORD@HOST/mlflow"),
        ("a.md", "token " + "a" * 64),
    ],
)
def test_text_that_only_names_a_credential_passes(tmp_path: Path, name: str, line: str) -> None:
    assert scanned(tmp_path, name, f"{line}\n") == []


def test_an_allowance_needs_a_reason_and_a_use(tmp_path: Path) -> None:
    allowed = tmp_path / credentials.ALLOWED
    allowed.parent.mkdir(parents=True)
    allowed.write_text(
        '[[allowed]]\npath = "a.yaml"\nmatch = "hunter"\nreason = "made up"\n'
        '[[allowed]]\npath = "b.yaml"\nmatch = "x"\nreason = "gone"\n'
        '[[allowed]]\npath = "c.yaml"\nmatch = "x"\nreason = ""\n'
    )
    problems = [what for _, what in scanned(tmp_path, "a.yaml", f"password: {WORD}\n")]
    assert len(problems) == 2
    assert any("b.yaml (x): allows nothing any more" in what for what in problems)
    assert any("a reason" in what for what in problems)
