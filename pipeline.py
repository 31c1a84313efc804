"""The pipeline's entry: hands over to `dgmd_pipeline.cli`."""

# Worker processes import this file again under another name: they must not start a run.
if __name__ == "__main__":
    from dgmd_pipeline.cli import command

    command()
