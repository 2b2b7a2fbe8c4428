"""Documents, examples and their split by client; the data sets that registry packages carry."""
