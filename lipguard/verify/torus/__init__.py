"""The matrix inequality of convolutional networks over frequencies."""
