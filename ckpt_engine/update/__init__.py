"""An update, executed: the pipeline that moves buckets, and the session that makes it all-or-nothing."""
