"""Results for people: tables, charts, crops, one HTML page."""
