"""Every result read into one object, seeds taken together as arms."""
