"""The networks: layers, the YAML as data, the model classes, checkpoints."""
