"""The classifier in Keras 3 on JAX, trained by one `fit` with `jit_compile`.

A callback takes the turns: it waits before an epoch and answers after it, so
that nothing but Keras's own loop is timed.
"""

import os
import time

os.environ["KERAS_BACKEND"] = "jax"  # Read when Keras is imported.

import jax
import keras
import worker
from keras import layers


def classifier(sizes: dict) -> keras.Model:
  """Convolution stages, LSTM, attention, the last token, one linear layer."""
  dropout = sizes["dropout"]
  inputs = x = keras.Input(sizes["image_shape"])
  for features in sizes["channels"]:
    x = layers.Conv2D(
      features, sizes["kernel_size"], padding="same", activation="relu"
    )(x)
    x = layers.Dropout(dropout)(layers.MaxPooling2D(sizes["pool"])(x))
  _, rows, columns, channels = x.shape
  if sizes["sequence"] == "rows":
    x = layers.Reshape((rows, columns * channels))(x)
  else:
    x = layers.Reshape((rows * columns, channels))(x)
  x = layers.LSTM(
    sizes["lstm_features"], return_sequences=True, unroll=sizes["unroll"]
  )(x)
  x = layers.Dropout(dropout)(x)
  normed = layers.LayerNormalization(epsilon=1e-6)(x)
  read = layers.MultiHeadAttention(sizes["num_heads"], sizes["head_dim"])(
    normed, normed
  )
  x = layers.Add()([x, layers.Dropout(dropout)(read)])
  x = layers.Dropout(dropout)(x[:, -1])
  return keras.Model(inputs, layers.Dense(sizes["num_classes"])(x))


class Turns(keras.callbacks.Callback):
  """Waits before every epoch; afterwards says how long it took."""

  def on_epoch_begin(self, epoch, logs=None):
    worker.wait()
    self.start = time.perf_counter()

  def on_epoch_end(self, epoch, logs):
    seconds = time.perf_counter() - self.start
    worker.say({"seconds": seconds, "loss": logs["loss"]})


def main() -> None:
  sizes, images, labels = worker.read()
  keras.utils.set_random_seed(sizes["seed"])
  model = classifier(sizes)
  model.compile(
    keras.optimizers.AdamW(
      sizes["learning_rate"], weight_decay=sizes["weight_decay"]
    ),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy"],
    jit_compile=True,
  )
  worker.say(
    {
      "parameters": model.count_params(),
      "versions": {"keras": keras.__version__, "jax": jax.__version__},
    }
  )
  model.fit(
    images,
    labels,
    batch_size=sizes["batch_size"],
    epochs=10**9,  # Until the input ends.
    verbose=0,
    callbacks=[Turns()],
  )


if __name__ == "__main__":
  main()
