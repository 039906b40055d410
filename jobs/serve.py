"""The ensemble over HTTP: an image in, its likeliest classes out; without a cluster.

python jobs/serve.py --port 8080
    then: curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'
python jobs/serve.py --model models:/googlenet-digits@champion --members 1,3
    some models of the ensemble of that name in MLflow's registry

GET /health answers when it is ready. Images in base64 in JSON are for `mlflow models serve`.
"""

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.ensemble.config import ServeConfig
from orchestrator.ray_backend import ray_env

PROG = "serve.py"

if __name__ == "__main__":
    config = parse_args(PROG, "Answer with what is in images.", {"model": Preset(ServeConfig())}, "model")
    # Torch is imported only now: help and refusals stay quick.
    ray_env.prepare_process()
    from orchestrator.cli import serve
    from orchestrator.cli.exit_status import make_console, run_command, tolerate_closed_output

    with tolerate_closed_output():
        raise SystemExit(run_command(PROG, lambda: serve.run_serve(config, make_console())))
