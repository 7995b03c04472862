"""Makes the report. Run as `python -m jobs.report STUDY`."""

from jobs.session import run_stage

if __name__ == "__main__":
    run_stage("report")
