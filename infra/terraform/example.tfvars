region = "eu-central-1"
bucket = "our-googlenet"

# Runs older than this are rarely read.
archive_runs_days = 60
