//! Model folders as transformers 5.23 reads them: the chat template of each row, and the special tokens that
//! several files declare. Expected values are those of `AutoTokenizer.from_pretrained` on the same files.

mod common;

use common::{Goldens, Scratch};
use serde_json::{Value, json};
use suasion_data::example::Conversation;
use suasion_data::template::TemplateOptions;
use suasion_data::{ModelFolder, Policy};

const CHATML: &str =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";

/// A folder with the tokenizer of the goldens, its configuration with these keys, and other files.
fn folder(config: Value, files: &[(&str, String)]) -> Scratch {
    let scratch = Scratch::new();
    let goldens = Goldens::repository();
    scratch.file("tokenizer.json", goldens.text("tokenizers/qwen2_5/tokenizer.json"));
    let mut all = goldens.json("tokenizers/qwen2_5/tokenizer_config.json");
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    scratch.file("tokenizer_config.json", all.to_string());
    std::fs::create_dir(scratch.path("additional_chat_templates")).unwrap();
    for (name, text) in files {
        scratch.file(name, text);
    }
    scratch
}

/// The first word of a rendering without tools, and with them.
fn first_words(scratch: &Scratch) -> [String; 2] {
    let template = ModelFolder::open(scratch.dir.path()).unwrap().template.expect("a template");
    [None, Some(vec![json!({"type": "function", "function": {"name": "f"}})])].map(|tools| {
        let messages = serde_json::from_value(json!([{"role": "user", "content": "hi"}])).unwrap();
        let c = Conversation { messages, weights: vec![None], tools, ..Conversation::default() };
        let text = template.render(&c, false, &TemplateOptions::default()).unwrap();
        text.split_whitespace().next().unwrap().to_string()
    })
}

#[test]
fn rows_with_tools_get_the_template_for_them() {
    let template = |word: &str| format!("{word} {CHATML}");
    let (main, tool_use) = ("chat_template.jinja", "additional_chat_templates/tool_use.jinja");
    let list = json!({"chat_template": [{"name": "default", "template": template("CD")}, {"name": "tool_use", "template": template("CT")}]});
    for (config, files, words) in [
        (json!({}), vec![(main, template("MAIN")), (tool_use, template("TOOL"))], ["MAIN", "TOOL"]),
        (json!({}), vec![(main, template("MAIN"))], ["MAIN", "MAIN"]),
        (list.clone(), vec![(main, template("MAIN"))], ["MAIN", "MAIN"]),
        (list, vec![], ["CD", "CT"]),
        (
            json!({}),
            vec![("additional_chat_templates/default.jinja", template("AD")), (tool_use, template("TOOL"))],
            ["AD", "TOOL"],
        ),
        // Here transformers has no template for rows without tools.
        (json!({"chat_template": template("CD")}), vec![(tool_use, template("TOOL"))], ["CD", "TOOL"]),
        // As `AutoProcessor` reads it.
        (
            json!({}),
            vec![("chat_template.json", json!({"chat_template": template("P")}).to_string())],
            ["P", "P"],
        ),
    ] {
        assert_eq!(first_words(&folder(config, &files)), words, "{files:?}");
    }
    // A change to either file gives another template.
    let of = |text: &str| {
        let scratch = folder(json!({}), &[(main, template("MAIN")), (tool_use, template(text))]);
        ModelFolder::open(scratch.dir.path()).unwrap().template.unwrap().fingerprint().to_string()
    };
    assert_ne!(of("TOOL"), of("TOOLS"));
    let alone = ModelFolder::open(folder(json!({}), &[(tool_use, template("TOOL"))]).dir.path()).unwrap();
    assert!(alone.template_error.unwrap().to_string().contains("there is a template for rows with tools"));
}

#[test]
fn special_tokens_are_variables() {
    let print = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ mask_token }}|{{ image_token }}|{{ boi_token }}|{{ sep_token is defined }}";
    let config = json!({"image_token": "<|image|>", "extra_special_tokens": {"boi_token": "<|boi|>"}, "unk_token": "<unk>"});
    let map = json!({"pad_token": "<|im_start|>", "mask_token": {"content": "<mask>", "lstrip": false}});
    let scratch = folder(
        config,
        &[("chat_template.jinja", print.into()), ("special_tokens_map.json", map.to_string())],
    );
    let open = || ModelFolder::open(scratch.dir.path()).unwrap().template.unwrap();
    let render = |options: &TemplateOptions| open().render(&Conversation::default(), false, options).unwrap();
    assert_eq!(
        render(&TemplateOptions::default()),
        "|<|im_end|>|<|im_start|>|<unk>|<mask>|<|image|>|<|boi|>|False"
    );
    // A call may set any of them except BOS and EOS.
    let policy =
        Policy { template_kwargs: [("pad_token".to_string(), json!("P"))].into(), ..Policy::default() };
    assert_eq!(render(&TemplateOptions::of(&policy)), "|<|im_end|>|P|<unk>|<mask>|<|image|>|<|boi|>|False");
    // Only the tokens that the template writes are part of the fingerprint.
    let fingerprint = || open().fingerprint().to_string();
    let before = fingerprint();
    scratch.file(
        "special_tokens_map.json",
        json!({"pad_token": "<|im_start|>", "mask_token": "<m>"}).to_string(),
    );
    assert_ne!(before, fingerprint());
    scratch.file(
        "special_tokens_map.json",
        json!({"pad_token": "<|im_start|>", "mask_token": "<mask>", "audio_token": "<a>"}).to_string(),
    );
    assert_eq!(before, fingerprint());
}

#[test]
fn older_files_of_special_tokens_count_where_there_is_no_decoder() {
    let open = |config: Value, files: &[(&str, Value)]| {
        let files: Vec<(&str, String)> = files.iter().map(|(name, json)| (*name, json.to_string())).collect();
        ModelFolder::open(folder(config, &files).dir.path()).map(|folder| folder.tokenizer.unwrap())
    };
    let map = ("special_tokens_map.json", json!({"eos_token": "<|endoftext|>", "pad_token": "<|im_start|>"}));
    let special = |config: Value| {
        let tokenizer = open(config, std::slice::from_ref(&map)).unwrap();
        [tokenizer.eos().unwrap().content.clone(), tokenizer.pad().unwrap().content.clone()]
    };
    assert_eq!(special(json!({"eos_token": "<|im_end|>"})), ["<|endoftext|>", "<|im_start|>"]);
    let decoder = json!({"eos_token": "<|im_end|>", "added_tokens_decoder": {}});
    assert_eq!(special(decoder), ["<|im_end|>", "<|endoftext|>"]);

    let added = ("added_tokens.json", json!({"<extra>": 525, "<|pad|>": 526, "</think>": 524}));
    let files = [added, ("special_tokens_map.json", json!({"pad_token": "<|pad|>"}))];
    let tokenizer = open(json!({}), &files).unwrap();
    assert_eq!(tokenizer.encode_text("a<extra>b<|pad|></think>c").unwrap(), [64, 525, 65, 526, 524, 66]);
    assert!(tokenizer.is_structural(526) && !tokenizer.is_structural(525));
    assert_eq!((tokenizer.vocab_size(), tokenizer.pad().unwrap().id), (527, 526));
    // With a decoder, the file does not belong to the tokenizer.
    let tokenizer = open(json!({"added_tokens_decoder": {}}), &files[..1]).unwrap();
    assert_eq!(tokenizer.encode_text("a<extra>b").unwrap(), [64, 27, 68, 87, 83, 81, 64, 29, 65]);
    // An id that the files do not give would have another embedding.
    let error = open(json!({}), &[("added_tokens.json", json!({"<extra>": 600}))]).unwrap_err().to_string();
    assert!(error.contains("added_tokens.json") && error.contains("\"<extra>\" the id 600"), "{error}");
}

#[test]
fn multimodal_configurations_have_their_language_model_inside() {
    let config = json!({"model_type": "gemma3", "text_config": {"vocab_size": 530, "eos_token_id": 516}});
    let scratch = folder(json!({"eos_token": "<|im_end|>"}), &[("config.json", config.to_string())]);
    let folder = ModelFolder::open(scratch.dir.path()).unwrap();
    assert_eq!(folder.vocab_size, Some(530));
    assert_eq!(folder.tokenizer.unwrap().stop_ids(&Policy::default()).unwrap(), [518, 516]);
}
