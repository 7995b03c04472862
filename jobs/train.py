"""Trains the cells. Run as `python -m jobs.train STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("train")
