"""Sources of text: the records of files and datasets (`files`), and what documents become of them (`documents`)."""
