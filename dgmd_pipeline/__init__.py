"""A bucket of labelled pictures becomes an image classifier in a model registry.

The way of one image: an object in the bucket is downloaded (`bucket`), inspected (`images`), its label gets a class
index (`labels`), large classes are cut down (`balance`), it goes to training or validation (`split`), becomes a
TFRecord (`records`) and, through the frozen backbone, a feature vector (`features`); of all of them a model is trained
(`training`), measured (`evaluation`, `report`) and registered (`registry`).

cli.py         the commands: arguments and environment -> graph -> exit code
run.py         settings -> one run: the plan, the graph, what is shown and told
settings.py    the environment -> one frozen object
tasks.py       the graph, to be read from top to bottom; names the step folders
step.py        the step contract: a folder that is there is done, says where it comes from, and whether it is today's
folders.py     a draft -> a folder that is whole: commit, recovery, the lock, what the disk refuses
bucket.py      the door to S3: object -> raw file
transfer.py    object -> raw file, faster
listing.py     a listing of the bucket <-> what lies in a folder: new, changed, gone, kept
corrections.py corrections.csv -> files with the right label, or left out
images.py      raw file -> inspected row
manifest.py    rows, in memory and as CSV
labels.py      rows -> label map
balance.py     rows -> fewer rows and class weights
split.py       row -> its side
encoding.py    raw file -> the pixels of the model's size that a record holds
records.py     row <-> TFRecord
features.py    record -> feature vector
backbones.py   a backbone's name -> its network in Keras and the file of its weights
model.py       layers: the frozen backbone, the head, the servable whole
linear.py      feature vectors and labels -> a logistic regression
head.py        stored features -> a trained head, chosen by cross-validation
augmentation.py  images -> randomly changed images
averaging.py   a training's epochs -> the mean of their weights
training.py    a network and batches -> a trained model: the loop, its checkpoint, and `cnn` from records
fine_tuning.py frozen backbone and head -> both trained together, where that is better
evaluation.py  model and records -> measurements
folds.py       labels and near-duplicate groups -> the cross-validation fold of each row
label_suspects.py stored features and labels -> the images whose label is probably wrong
comparison.py  two models' probabilities for the same pictures -> which is better, how sure, and what stands in the way
leaks.py       features of both splits -> validation images that have a near-duplicate in training
assessment.py  a saved model in a clean process -> load time, latency, throughput, memory
review.py      a model, production and the pictures at hand -> what an operator decides from
plots.py       measurements -> pictures for people
report.py      measurements and pictures -> report.html, from which a person decides
registry.py    the door to MLflow: run, model and version
served.py      a registered model's folder -> the function that its consumers call; stored with each model
production.py  which version is production: promotion, rollback, history, in the registry
operations.py  what an operator does with registered models: models, promote, rollback, history, compare, predict
schedule.py    times -> runs, each in a process of its own
status.py      what a run came to <-> status.json, for the health check
notify.py      what a run came to -> somebody's URL
workers.py     pieces of work -> results, in processes on all cores
timing.py      records of the steps that ran -> where the time went
signals.py     SIGINT and SIGTERM -> the run's end, in time
progress.py    finished pieces -> a bar or log lines
errors.py      what a person is told, and the exit code that goes with it
demo.py        a small real data set behind a local S3 endpoint
"""
