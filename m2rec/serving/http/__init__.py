"""A trained run over HTTP: rankings, live users, new items, a page. Needs the extra `serve`."""
