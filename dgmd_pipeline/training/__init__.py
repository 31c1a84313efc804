"""Networks and their training. Only this package uses Keras layers and `tf.data`."""
