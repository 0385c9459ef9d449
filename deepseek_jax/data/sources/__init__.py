"""Sources of data: builders, and what finds, prepares and reads them."""
