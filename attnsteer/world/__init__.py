"""A small procedural world with exact ground truth, and the models trained on it.

Scenes hold one to four objects of COCO categories, drawn as Noto emoji on a coloured background. Everything that a
test or a benchmark needs is known exactly: categories, boxes, masks, background, frames, who is left of whom.
`attnsteer.world.sampling.sample(seed)` makes a scene, `attnsteer.world.assets.path("models/world-sd3")` finds the
models trained on it.
"""
