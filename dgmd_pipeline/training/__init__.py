"""Networks and their training; the only users of Keras layers and `tf.data`."""
