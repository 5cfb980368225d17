//! Renderings and masks made by transformers.

use crate::*;

struct Golden {
    folder: Goldens,
    meta: Value,
    conversations: Value,
    rows: Vec<Value>,
    templates: BTreeMap<String, Arc<ChatTemplate>>,
}

impl Golden {
    fn read(folder: Goldens) -> Golden {
        let meta = folder.json("goldens/template_meta.json");
        let templates = meta["templates"].as_object().unwrap().iter().map(|(name, meta)| {
            let source = folder.text(&format!("templates/{name}"));
            let template = ChatTemplate::new(&source, meta["bos_token"].as_str(), meta["eos_token"].as_str());
            (name.clone(), Arc::new(template.unwrap_or_else(|e| panic!("{name}: {e}"))))
        });
        Golden {
            templates: templates.collect(),
            conversations: folder.json("goldens/template_conversations.json"),
            rows: folder.lines("goldens/templates.jsonl"),
            meta,
            folder,
        }
    }
}

/// A golden's conversation, and whether it requests a generation prompt.
fn golden_conversation(value: &Value) -> (Conversation, bool) {
    let mut c = conversation(&value["messages"]);
    c.tools = value["tools"].as_array().cloned();
    c.kwargs = value["kwargs"].as_object().cloned().unwrap_or_default();
    (c, value["add_generation_prompt"] == true)
}

#[test]
fn renderings_are_transformers() {
    goldens().into_iter().map(Golden::read).for_each(renderings_equal);
}

fn renderings_equal(golden: Golden) {
    let mut wrong: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let mut right = 0;
    for row in &golden.rows {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let (c, generation) = golden_conversation(&golden.conversations[conv]);
        let got = golden.templates[name].render(&c, generation, &options());
        let same = match (&got, row["rendered"].as_str()) {
            (Ok(got), Some(want)) => got == want,
            (Err(_), None) => true,
            _ => false,
        };
        if same {
            right += 1;
        } else {
            let want = row["rendered"].as_str().or(row["error"].as_str()).unwrap();
            let got = got.unwrap_or_else(|e| format!("ERROR {e}"));
            let at = got.bytes().zip(want.bytes()).take_while(|(a, b)| a == b).count().saturating_sub(20);
            let show =
                |t: &str| t[t.floor_char_boundary(at.min(t.len()))..].chars().take(120).collect::<String>();
            wrong.entry(name).or_default().push(format!(
                "{conv}: got {:?} want {:?}",
                show(&got),
                show(want)
            ));
        }
    }
    println!("renderings: {right} of {} equal", golden.rows.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Filters, tests, methods and operators, one by one, are rendered as transformers renders them.
#[test]
fn expressions_are_transformers() {
    let mut wrong = Vec::new();
    for row in Goldens::repository().lines("goldens/expressions.jsonl") {
        let source = row["source"].as_str().unwrap();
        let got = ChatTemplate::new(source, None, None).map_err(|e| e.to_string()).and_then(|template| {
            template.render(&Conversation::default(), false, &options()).map_err(|e| e.to_string())
        });
        let same = match (&got, row["rendered"].as_str()) {
            (Ok(got), Some(want)) => got == want,
            (got, want) => got.is_err() && want.is_none(),
        };
        if !same {
            wrong.push(json!({"source": source, "got": got, "want": row["rendered"]}));
        }
    }
    wrong.iter().for_each(|row| println!("WRONG {row}"));
    assert!(wrong.is_empty(), "{} expressions", wrong.len());
}

#[test]
fn masks_of_generation_blocks_are_transformers() {
    goldens().into_iter().map(Golden::read).for_each(masks_equal);
}

fn masks_equal(golden: Golden) {
    let mut tokenizers: BTreeMap<String, Tokenizer> = BTreeMap::new();
    let mut wrong = Vec::new();
    let (mut n, mut in_parts) = (0, 0);
    for row in golden.rows.iter().filter(|row| !row["mask"].is_null()) {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let meta = &golden.meta["templates"][name];
        let (mut c, generation) = golden_conversation(&golden.conversations[conv]);
        c.weights = vec![None; c.messages.len()];
        let stops = golden_stops(name, meta);
        n += 1;
        let chat = match spans(&golden.templates[name], &c, &stops) {
            Ok(chat) => chat,
            // transformers supervises nothing of an answer that the template does not render.
            Err(e) if e.to_string().contains("does not render its content") => {
                let rendered = row["rendered"].as_str().unwrap();
                let mut said = c.messages.iter().filter(|m| m["role"] == "assistant");
                assert!(
                    said.any(|m| !rendered.contains(m["content"].as_str().unwrap().trim())),
                    "{name} {conv}"
                );
                continue;
            }
            Err(e) => {
                wrong.push(format!("{name} {conv}: {e}"));
                continue;
            }
        };
        learned(&chat);
        if golden.templates[name].render(&c, false, &options()).ok().as_ref() != Some(&chat.rendered.text) {
            // The template drops content that is a string. Its rendering is that of the same texts in parts.
            for content in c.messages.iter_mut().filter_map(|message| message.get_mut("content")) {
                if let Value::String(text) = content {
                    *content = json!([{"type": "text", "text": text}]);
                }
            }
            let want = golden.templates[name].render(&c, false, &options()).unwrap();
            assert_eq!(chat.rendered.text, want, "{name} {conv}");
            in_parts += 1;
            continue;
        }
        let key = meta["tokenizer"].as_str().unwrap();
        let tokenizer = tokenizers
            .entry(key.into())
            .or_insert_with(|| Tokenizer::from_dir(&golden.folder.dir.join("tokenizers").join(key)).unwrap());
        let policy = Policy { boundary: suasion_data::Boundary::Joint, ..Policy::default() };
        let tokens = tokenizer.encode(&chat.rendered, &policy).unwrap().tokens;
        let mask: Vec<u8> = tokens.origins.iter().map(|o| u8::from(o.supervised())).collect();
        let want: Vec<u8> = match &row["mask"] {
            Value::String(bits) => bits.bytes().map(|b| b - b'0').collect(),
            list => serde_json::from_value(list.clone()).unwrap(),
        };
        let mut ids: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
        let mut want = want;
        let (mut got, mut mask) = (tokens.ids, mask);
        if generation {
            // Training text has no open generation prompt, with which the golden ends; if the named tokenizer is
            // not the template's own, the last marker's letters merge with it.
            let shared = got.iter().zip(&ids).take_while(|(a, b)| a == b).count();
            assert!(shared + 4 >= got.len(), "{name} {conv}: {shared} of {}", got.len());
            for list in [&mut ids, &mut got] {
                list.truncate(shared);
            }
            for list in [&mut want, &mut mask] {
                list.truncate(shared);
            }
        }
        if got != ids {
            wrong.push(format!("{name} {conv}: ids"));
        } else if mask != want {
            wrong.push(format!("{name} {conv}: mask, learned {:?}", learned(&chat)));
        }
    }
    println!("masks: {} of {} equal, {in_parts} in parts", n - in_parts - wrong.len(), n - in_parts);
    assert!(in_parts < n / 4, "{in_parts} of {n}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn spans_are_proved_without_generation_blocks() {
    goldens().into_iter().map(Golden::read).for_each(spans_hold);
}

fn spans_hold(golden: Golden) {
    let (mut solved, mut all) = (0, 0);
    let mut unsolved = Vec::new();
    let mut wrong = Vec::new();
    for row in &golden.rows {
        let (name, conv) = (row["template"].as_str().unwrap(), row["conv"].as_str().unwrap());
        let meta = &golden.meta["templates"][name];
        let (c, _) = golden_conversation(&golden.conversations[conv]);
        // The reader leaves only content that is text.
        let texts = c.messages.iter().all(|m| m.get("content").is_some_and(Value::is_string));
        // A position can only be proved for rendered text, before which nothing depends on later messages.
        let calls = c.messages.iter().any(|m| m.contains_key("tool_calls"));
        let provable = meta["spans"] != "none" && !(calls && meta["spans"] == "no_calls");
        if row["rendered"].is_null() || meta["generation"] == true || !texts || !provable {
            continue;
        }
        all += 1;
        let stops = golden_stops(name, meta);
        let chat = match spans(&golden.templates[name], &c, &stops) {
            Ok(chat) => chat,
            Err(e) => {
                unsolved.push(format!("{name} {conv}: {e}"));
                continue;
            }
        };
        let learned = learned(&chat);
        let said: Vec<&Map<String, Value>> = c.messages.iter().filter(|m| m["role"] == "assistant").collect();
        let mut at = 0;
        let mut ok = true;
        for message in &said {
            let content = message["content"].as_str().unwrap_or_default();
            // Templates may trim an answer, and drop its thoughts from the history.
            let core = content.rsplit("</think>").next().unwrap().trim();
            let calls = message.contains_key("tool_calls");
            let found = learned[at..].iter().position(|run| {
                let body =
                    stops.all.iter().find_map(|s| run.strip_suffix(s.as_str())).unwrap_or(run).trim_end();
                if calls {
                    run.contains(core)
                } else if core.is_empty() {
                    // Some templates render nothing of an empty answer, not even its end.
                    body.is_empty()
                } else {
                    body.ends_with(core) || run.trim_end().ends_with(core)
                }
            });
            match found {
                Some(found) => at += found + 1,
                None if core.is_empty() => {}
                // Dropped beside its tool calls: then the row has a finding.
                None if calls && !chat.rendered.text.contains(core) => {
                    ok &= codes(&chat).contains(&Code::C001);
                }
                None => ok = false,
            }
        }
        // No text of other messages.
        let others = c.messages.iter().filter(|m| m["role"] != "assistant");
        for other in others {
            let theirs = other["content"].as_str().unwrap().trim();
            let echoed = said.iter().any(|m| Value::Object((*m).clone()).to_string().contains(theirs));
            ok &= echoed || !learned.iter().any(|run| run.contains(theirs));
        }
        ok &= learned.len() <= said.len();
        if ok { solved += 1 } else { wrong.push(format!("{name} {conv}: {learned:?}")) }
    }
    println!(
        "spans: {solved} of {all} (template, conversation) pairs solved ({:.1} %)",
        100.0 * solved as f64 / all as f64
    );
    for line in &unsolved {
        println!("  error: {line}");
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(solved * 100 >= all * 95);
}
