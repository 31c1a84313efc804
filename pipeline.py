"""The entry point of the command line: calls `dgmd_pipeline.cli`."""

import sys

# A worker process must not start a run. It also imports this file, but under another name than `__main__`.
if __name__ == "__main__":
    try:
        from dgmd_pipeline.cli import command

        command()
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dgmd_pipeline"):
            raise
        print(  # noqa: T201 - there is no log yet
            f"error: {error.name} is not installed for {sys.executable}. Use the Python that the pipeline is installed "
            "for, for example .venv/bin/python, or install it: pip install -e .",
            file=sys.stderr,
        )
        sys.exit(2)
