"""Record of a run: an event journal in the run's storage, its replay into MLflow, and plots."""
