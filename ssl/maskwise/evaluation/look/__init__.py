"""Pictures of one model on a few images: attention, masks, boxes, similarities, as a sheet or an interactive page."""
