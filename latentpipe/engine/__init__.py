"""Drawing as a job: events, previews, cancel, replay, grids. Knows no interface."""
