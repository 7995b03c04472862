"""The judges compare the base's answers with each cell's. Run as `python -m jobs.judge STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("judge")
