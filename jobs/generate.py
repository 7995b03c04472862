"""The base and every cell answer the evaluation prompts. Run as `python -m jobs.generate STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("generate")
