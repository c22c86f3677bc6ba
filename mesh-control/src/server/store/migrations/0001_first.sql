-- Portable between SQLite and PostgreSQL: BIGINT and TEXT only, records as JSON text in "body".
-- The columns beside it are those that must be unique or are worth an index.

CREATE TABLE tailnets (
    tailnet BIGINT NOT NULL PRIMARY KEY,
    last_event BIGINT NOT NULL,
    last_user BIGINT NOT NULL,
    last_key BIGINT NOT NULL,
    last_node BIGINT NOT NULL,
    last_address BIGINT NOT NULL
);

CREATE TABLE events (
    tailnet BIGINT NOT NULL,
    id BIGINT NOT NULL,
    at BIGINT NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id)
);

CREATE TABLE users (
    tailnet BIGINT NOT NULL,
    id BIGINT NOT NULL,
    name TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id),
    UNIQUE (tailnet, name)
);

CREATE TABLE auth_keys (
    tailnet BIGINT NOT NULL,
    id BIGINT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id)
);

CREATE TABLE codes (
    tailnet BIGINT NOT NULL,
    id TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id)
);

CREATE TABLE logins (
    tailnet BIGINT NOT NULL,
    id TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id)
);

CREATE TABLE nodes (
    tailnet BIGINT NOT NULL,
    id BIGINT NOT NULL,
    machine_key TEXT NOT NULL,
    node_key TEXT NOT NULL,
    address TEXT NOT NULL,
    name TEXT NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (tailnet, id),
    UNIQUE (tailnet, node_key),
    UNIQUE (tailnet, address),
    UNIQUE (tailnet, name)
);
