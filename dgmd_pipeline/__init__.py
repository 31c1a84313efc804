"""A bucket of labelled images becomes an image classifier in a model registry.

An image goes through these stages: an object in the bucket is downloaded (`s3`), inspected, labelled, balanced, split
and written to a TFRecord (`data`), and becomes a feature vector that a model is trained on (`training`). The model is
measured (`evaluation`) and registered (`registry`).

cli.py               the command line: parses the arguments and calls a command
commands/            the commands, and what they share
tasks/               the graph: which step needs which; names the step folders
settings.py          environment -> Settings
environment.py       a user's environment -> one that libraries accept
env_file.py          mistakes in a file of variables -> sentences
invalid_settings.py  checks of values; an invalid setting -> a sentence
certificates.py      variables that name certificate files -> mistakes
manifest.py          row types and their files
errors.py            the exceptions for operators, with their exit codes
formatting.py        bytes, durations, shares, tables, URIs -> text that is safe to show
workflow/            Luigi and the step contract: folders, fingerprints, plans, processes, progress
s3/                  bucket -> files
data/                files -> rows, splits and TFRecord shards
training/            shards and features -> a trained model
evaluation/          a trained model -> metrics, comparison, serving benchmark, promotion conditions, report
serving/             what a served model accepts, and the code that a registered model carries
registry/            trained models <-> MLflow
"""
