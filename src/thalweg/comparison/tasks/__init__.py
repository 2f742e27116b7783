"""The tasks of `thalweg compare TASK`: one module each, with a `Config` and `run(config, lab)`."""
