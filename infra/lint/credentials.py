"""A scan of every committed file for what looks like a credential.

Patterns of our own rather than a library: detect-secrets, the usual one for Python, had its last release in May 2024,
and gitleaks' package on PyPI in 2022.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from infra.lint.report import Problem, Report
from infra.lint.tree import Tree

ALLOWED = "infra/lint/allowed.toml"
ADVICE = f"remove it and make a new one, for history keeps it; or allow it, with a reason, in {ALLOWED}"

SURE = {
    "an AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})"),
    "a Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "a Google API key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b"),
    "a JSON web token": re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    "a URL with a password": re.compile(r"\b[a-z][a-z0-9+]*://[^\s/:@'\"{}$<>]+:(?P<value>[^\s/@'\"]{3,})@"),
}
SECRET = r"(?:password|passwd|passphrase|secret(?:_?(?:access_?)?key)?|token|api_?key|credential)s?"
NEAR = re.compile(rf"(?i){SECRET}")
# In code only a literal counts; in a configuration any plain word does.
LITERAL = re.compile(rf"(?i)\b\w*{SECRET}[\"']?\s*(?:=|:)\s*[\"'](?P<value>[^\"'\s]{{8,}})[\"']")
PLAIN = re.compile(
    rf"(?i)^[\s-]*(?:export\s+)?[\"']?[\w.-]*{SECRET}[\"']?\s*[:=]\s*(?P<value>[^\s\"'#,{{}}\[\]]{{6,}})\s*(?:#.*)?$"
)
CONFIGURATIONS = (".yaml", ".yml", ".ini", ".cfg", ".conf", ".env", ".tfvars", ".properties", ".service", ".toml")
RANDOM = re.compile(r"\b(?:[0-9a-f]{40,}|(?=\w*\d)(?=\w*[a-z])(?=\w*[A-Z])[A-Za-z0-9]{40,})\b")
# Names, references and things that only stand for a value.
HARMLESS = re.compile(
    r"(?ix) ^ (?: [$<{(*&!%|>] | \\ | \.{3} | true$ | false$ | null$ | none$ | yes$ | no$ | [~/.] | (?:s3|https?|file)://"
    r"| [\w.-]+:/[\w./-]+ $"  # systemd's NAME:PATH
    r"| .*(?: example | placeholder | your | change | dummy | fixed | redacted | xxx | \*\*\* | \$\{ | \{\{ ) )"
)
LEAST_BITS = 3.0


@dataclass
class Allowance:
    """A place where something that looks like a credential may stand, and why."""

    path: str
    match: str
    reason: str
    used: bool = False

    def covers(self, name: str, line: str) -> bool:
        """Return whether it is about this line; remembered, so that one that covers nothing is reported."""
        if not Path(name).match(self.path) or re.search(self.match, line) is None:
            return False
        self.used = True
        return True


def credentials(tree: Tree) -> Report:
    """Report what looks like a credential in any file, and exceptions that allow nothing any more."""
    allowances, problems = _allowances(tree)
    files = 0
    for name in tree.files:
        text = tree.text(name)
        if text is None or name == ALLOWED:
            continue
        files += 1
        for number, line in enumerate(text.splitlines(), 1):
            what = suspicion(line, name.endswith(CONFIGURATIONS) or "/.env" in f"/{name}")
            if what and not any([allowance.covers(name, line) for allowance in allowances]):
                problems.append(Problem(name, number, f"looks like {what}: {ADVICE}"))
    problems += [
        Problem(ALLOWED, 1, f"{allowance.path} ({allowance.match}): allows nothing any more: remove it")
        for allowance in allowances
        if not allowance.used
    ]
    return Report("credentials", files, tuple(problems))


def _allowances(tree: Tree) -> tuple[list[Allowance], list[Problem]]:
    found, problems = [], []
    if ALLOWED in tree.files:
        for entry in tomllib.loads(tree.text(ALLOWED) or "").get("allowed", []):
            if set(entry) == {"path", "match", "reason"} and entry["reason"]:
                found.append(Allowance(**entry))
            else:
                problems.append(Problem(ALLOWED, 1, f"{entry}: must have path, match and a reason"))
    return found, problems


def suspicion(line: str, configuration: bool) -> str | None:
    """Return what a line looks like; None when it holds no credential."""
    for what, pattern in SURE.items():
        match = pattern.search(line)
        value = (match.groupdict().get("value") if match else None) or "it"
        if match and not HARMLESS.match(value) and not value.isupper():
            return what
    for pattern in (LITERAL, PLAIN) if configuration else (LITERAL,):
        if (match := pattern.search(line)) and not HARMLESS.match(match["value"]) and not _is_a_name(match["value"]):
            return "a secret given as it is"
    if NEAR.search(line) and any(bits(value) >= LEAST_BITS for value in RANDOM.findall(line)):
        return "random letters beside the word for a secret"
    return None


def _is_a_name(value: str) -> bool:
    """Return whether it is made of words: the name of a secret, not the secret."""
    return re.fullmatch(r"[A-Za-z]+(?:[ _./:-][A-Za-z]+)*", value) is not None and not re.search(
        r"[a-z][A-Z].*[a-z][A-Z]", value
    )


def bits(value: str) -> float:
    """Shannon's entropy of a text's letters, in bits a letter; random hexadecimals have nearly four."""
    counts = Counter(value)
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
