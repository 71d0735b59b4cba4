"""The build step: TensorFlow checkpoint -> folded, verified weights -> the graphs that devices run."""
