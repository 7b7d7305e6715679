-- The format of run.db, as numbered steps. Steps are appended, never edited: an older file is
-- brought forward by the steps that it lacks, each in one transaction with its number
-- (PRAGMA user_version).
--
-- A stream's table is made when its first value comes, and is dull on purpose:
--
--     CREATE TABLE "curvature" (step INTEGER PRIMARY KEY, "sharpness", "sharpness.error", …)
--     SELECT step, "sharpness" FROM curvature
--
-- Columns of values declare no type, so SQLite keeps each value as it comes: a REAL, or the text
-- 'nan', because it would turn a NaN into NULL. NULL: not measured.

-- step 1
PRAGMA application_id = 1685679716;  -- 'dynd'

-- Where each series is. The table is the name up to the first '/', the column the rest, but for a
-- suffix (__2, __3, …) where SQLite would take two names for one or a table is full.
CREATE TABLE series (
    name TEXT PRIMARY KEY,
    "table" TEXT NOT NULL,
    "column" TEXT NOT NULL
);

-- What has too many parts for columns: a spectral density, its nodes.
CREATE TABLE arrays (
    name TEXT NOT NULL,
    step INTEGER NOT NULL,
    dtype TEXT NOT NULL,  -- as NumPy spells it, with byte order: '<f8'
    shape TEXT NOT NULL,  -- JSON list
    data BLOB NOT NULL,   -- C order
    PRIMARY KEY (name, step)
);

CREATE TABLE events (
    kind TEXT NOT NULL,
    start INTEGER NOT NULL,
    peak INTEGER NOT NULL,
    "end" INTEGER,         -- NULL while the event is open
    severity,
    confidence,
    series TEXT NOT NULL,  -- JSON list, the deciding one first
    details TEXT NOT NULL, -- JSON object
    PRIMARY KEY (kind, start, series)
);

-- JSON by key; a float that JSON cannot hold is {"float": "nan"}, "inf" or "-inf".
CREATE TABLE metadata (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
);
