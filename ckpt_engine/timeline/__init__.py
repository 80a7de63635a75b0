"""What an update did, and when: recorded on each rank, written as a trace, shown as a page or a picture."""
