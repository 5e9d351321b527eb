"""Prompt templates that put a class name into words, by the protocol's `caption_join`.

The wordings are our own; the idea of many, whose unit features are averaged, is Radford et al.'s (2021, section 3.1.4),
and so is a set of its own for tiny pictures.
"""

IMAGENET = (
    "a photograph of a {}.",
    "a snapshot of a {}.",
    "a close view of a {}.",
    "a {} seen from far away.",
    "a {} seen from above.",
    "a {} seen from the side.",
    "a {} in the middle of the picture.",
    "a {} at the edge of the picture.",
    "a {} that is partly hidden.",
    "a picture with more than one {}.",
    "a picture of just one {}.",
    "a blurred picture of a {}.",
    "a sharp picture with every detail of a {}.",
    "a dark picture of a {}.",
    "an overexposed picture of a {}.",
    "a grey picture of a {}.",
    "a colourful picture of a {}.",
    "a grainy picture of a {}.",
    "a picture of a {} with compression artefacts.",
    "a picture of a {} on a plain background.",
    "a picture of a {} in a cluttered room.",
    "a picture of a {} outdoors.",
    "a {} in front of other things.",
    "a {} for sale in a shop.",
    "somebody's {}.",
    "a {} of unusual shape.",
    "a typical {}.",
    "a small {}.",
    "a large {}.",
    "an old {}.",
    "a brand-new {}.",
    "a pencil drawing of a {}.",
    "a {} painted in oil.",
    "a {} as a comic shows it.",
    "a figurine of a {}.",
    "this is what a {} looks like.",
)

CIFAR = (
    "a tiny photograph of a {}.",
    "a thumbnail of a {}.",
    "a {} in very few pixels.",
    "a {} scaled down to an icon.",
    "a coarse picture of a {}.",
    "a blurred thumbnail of a {}.",
    "a pale thumbnail of a {}.",
    "a bright thumbnail of a {}.",
    "a dark thumbnail of a {}.",
    "a small picture that a {} fills.",
    "a small picture with a {} in its centre.",
    "a small picture of part of a {}.",
    "a big {} in a small picture.",
    "a little {} in a small picture.",
    "a small picture of a {} on a plain background.",
    "a small picture of a {} outdoors.",
)

PLAIN = ("a photo of a {}.",)

# `class_name` leaves the wording to the protocol's `prompt`, which is PLAIN's unless it is changed.
CLASS_WORDINGS = {"imagenet_templates": IMAGENET, "cifar_templates": CIFAR, "class_name": ("{}",)}
