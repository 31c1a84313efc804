"""A bucket of labelled images becomes an image classifier in a model registry.

An image goes through these stages: an object in the bucket is downloaded (`s3`), inspected, labelled, balanced, split
and written to a TFRecord (`data`), and becomes a feature vector that a model is trained on (`training`). The model is
measured (`evaluation`) and registered (`registry`).

cli.py               parses the command line and calls a command
commands/            the commands, and the code that they share
tasks/               the steps and their dependencies; names of the step folders
settings.py          reads the settings from the environment
environment.py       prepares the environment for libraries
env_file.py          explains mistakes in a file of variables
invalid_settings.py  checks values and explains invalid ones
certificates.py      checks the variables that name certificate files
manifest.py          types of rows, and the files that contain the rows
errors.py            exceptions for operators, with exit codes
formatting.py        formats bytes, durations, shares, tables and URIs as text
workflow/            Luigi and the step contract: folders, fingerprints, plans, processes, progress
s3/                  downloads images from the bucket
data/                inspects, splits and converts images
training/            trains models on TFRecords or features
evaluation/          metrics, comparison, serving benchmark, promotion conditions, report
serving/             the input of a served model, and the code that a registered model contains
registry/            registers and loads models in MLflow
"""
