"""The build step: TensorFlow checkpoint -> folded, verified weights -> graphs for devices."""
