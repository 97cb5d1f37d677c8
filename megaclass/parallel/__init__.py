"""Between ranks: who owns which class (`shard`), what is sent (`collectives`), who takes part (`process`)."""
