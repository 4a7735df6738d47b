"""What a run leaves for people: layers.csv and one self-contained report.html."""
