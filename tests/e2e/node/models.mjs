import { assert, client, listed } from "./client.mjs";

assert.deepEqual((await listed(client.models.list())).map((card) => card.id), ["tiny", "team/alias"]);
assert.equal((await client.models.retrieve("team/alias")).id, "team/alias");
