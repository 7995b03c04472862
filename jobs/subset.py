"""Draws the subsets of the grid. Run as `python -m jobs.subset STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("subset")
