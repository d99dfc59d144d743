// Ask a lorakit server with OpenAI's own client for Node: stream an answer, then say how good it was.
//
//     npm install openai
//     node openai_node.ts http://127.0.0.1:8000 MODEL 'Tell me about a fox.'     (Node 22.18 or later runs it as it is)
//
// The key is read from OPENAI_API_KEY; a server without keys takes any.
import OpenAI from "openai";

const [server, model, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: process.env.OPENAI_API_KEY ?? "none" });

const { data: stream, response } = await client.chat.completions
  .create({ model, messages: [{ role: "user", content: question }], max_tokens: 64, seed: 1, stream: true })
  .withResponse();
console.log(`${response.headers.get("x-lora-adapter")}:`);
let id = "";
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta?.content ?? "");
  id = chunk.id;
}
console.log();
await client.post("/feedback", { body: { response_id: id, rating: 1 } });
