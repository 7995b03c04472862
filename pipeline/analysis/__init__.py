"""Statistics as pure functions: no files, no network. Each cites where its formula comes from."""
