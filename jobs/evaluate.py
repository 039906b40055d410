"""`orchestrator evaluate` from a checkout, also by `ray job submit --working-dir . -- python jobs/...`."""

from orchestrator.cli.main import run_job

if __name__ == "__main__":
    raise SystemExit(run_job(__file__))
