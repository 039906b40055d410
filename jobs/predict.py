"""What images show, as an ensemble sees it; without a cluster.

python jobs/predict.py cat.jpg holiday/ s3://bucket/photos/ https://example.org/dog.jpg
    by the champion in the registry of the default storage; where there is none, by the newest ensemble trained whole
python jobs/predict.py cat.jpg --model googlenet-digits-x7-0123456789abcdef --members 1,3 --crops 144
    by some models of a certain ensemble, on all 144 crops
python jobs/predict.py cat.jpg --model models:/googlenet-digits@champion --json
    by the ensemble of that name in MLflow's registry, as a line of JSON for each image

Exit status: 0 all images were classified, 1 some could not be read, 2 refused.
"""

from orchestrator.config.arg_parser import Preset, parse_args
from orchestrator.ensemble.config import PredictConfig
from orchestrator.ray_backend import ray_env

PROG = "predict.py"

if __name__ == "__main__":
    config = parse_args(PROG, "Show what is in images.", {"images": Preset(PredictConfig())}, "images")
    # Torch is imported only now: help and refusals stay quick.
    ray_env.prepare_process()
    from orchestrator.cli import predict
    from orchestrator.cli.exit_status import make_console, run_command

    raise SystemExit(run_command(PROG, lambda: predict.run_predict(config, make_console())))
