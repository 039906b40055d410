"""What images show, as an ensemble sees it; without a cluster.

python jobs/predict.py cat.jpg holiday/ s3://bucket/photos/ https://example.org/dog.jpg
    by the champion in the registry of the default storage; where there is none, by the newest ensemble trained whole
python jobs/predict.py cat.jpg --model googlenet-digits-x7-0123456789abcdef --members 1,3 --crops 144
    by some models of a certain ensemble, on all 144 crops
python jobs/predict.py cat.jpg --model models:/googlenet-digits@champion --json
    by the ensemble of that name in MLflow's registry, as a line of JSON for each image

Exit status: 0 all images were classified, 1 some could not be read, 2 refused.
"""

from orchestrator.config.cli import Preset, parse
from orchestrator.ensemble.predicting_config import Predict
from orchestrator.launch import environment

PROG = "predict.py"

if __name__ == "__main__":
    config = parse(PROG, "Show what is in images.", {"images": Preset(Predict())}, "images")
    # Torch is imported only now: help and refusals stay quick.
    environment.settle()
    from orchestrator.ensemble import predicting
    from orchestrator.launch.screen import console, guarded

    raise SystemExit(guarded(PROG, lambda: predicting.predict(config, console())))
