"""What the task's file names."""

from PIL import Image


def picture(doc):
    return [Image.open(doc["image"])]
