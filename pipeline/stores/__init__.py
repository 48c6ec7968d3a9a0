"""Where state is kept: the promise (`base`), the model (`memory`), the real one (`rocksdb`)."""
