"""The scenes of the demo: images of up to four drawings on a grid, with captions that determine them, and edits."""
