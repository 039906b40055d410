"""The ensemble over HTTP: an image in, its likeliest classes out; without a cluster.

python jobs/serve.py --port 8080
    then: curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' 'http://127.0.0.1:8080/?crops=144&top=3'
python jobs/serve.py --model models:/googlenet-digits@champion --members 1,3
    some models of the ensemble of that name in MLflow's registry

GET /health answers when it is ready. Images in base64 in JSON are for `mlflow models serve`.
"""

from orchestrator.config.cli import Preset, parse
from orchestrator.ensemble.predicting_config import Serve
from orchestrator.launch import environment

PROG = "serve.py"

if __name__ == "__main__":
    config = parse(PROG, "Answer with what is in images.", {"model": Preset(Serve())}, "model")
    # Torch is imported only now: help and refusals stay quick.
    environment.settle()
    from orchestrator.ensemble import predicting_http
    from orchestrator.launch.screen import console, guarded, lasting_output

    with lasting_output():
        raise SystemExit(guarded(PROG, lambda: predicting_http.serve(config, console())))
