"""The teacher writes the training rows and the held-out answers. Run as `python -m jobs.synthesize STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("synthesize")
