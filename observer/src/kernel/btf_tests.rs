use super::*;

/// Writes BTF by hand: types as words, names interned.
#[derive(Default)]
struct Writer {
    types: Vec<u8>,
    strings: Vec<u8>,
}

impl Writer {
    fn name(&mut self, name: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if name.is_empty() {
            return 0;
        }
        let at = u32::try_from(self.strings.len()).expect("small");
        self.strings.extend_from_slice(name.as_bytes());
        self.strings.push(0);
        at
    }

    fn words(&mut self, words: &[u32]) {
        self.types.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    }

    fn kind(&mut self, name: &str, kind: u32, vlen: u32, size_or_id: u32) {
        let name = self.name(name);
        self.words(&[name, kind << 24 | vlen, size_or_id]);
    }

    fn finish(self) -> Vec<u8> {
        write(&self.types, &self.strings).expect("small")
    }
}

/// 1 int · 2 struct inner{b@32} · 3 struct outer{a@0, union{inner}@64, in@128} · 4 anon union
/// · 5 enum · 6 proto(void*, ptr, int) · 7 ptr to proto · 8 typedef
fn sample() -> Vec<u8> {
    let mut btf = Writer::default();
    btf.kind("int", KIND_INT, 0, 4);
    btf.words(&[32]);
    btf.kind("inner", KIND_STRUCT, 1, 8);
    let b = btf.name("b");
    btf.words(&[b, 1, 32]);
    btf.kind("outer", KIND_STRUCT, 3, 24);
    let (a, named) = (btf.name("a"), btf.name("in"));
    btf.words(&[a, 1, 0, 0, 4, 64, named, 2, 128]);
    btf.kind("", KIND_UNION, 1, 8);
    let hidden = btf.name("hidden");
    btf.words(&[hidden, 1, 0]);
    btf.kind("reason", KIND_ENUM, 1, 4);
    let drop = btf.name("DROP");
    btf.words(&[drop, 12]);
    btf.kind("", KIND_FUNC_PROTO, 3, 0);
    btf.words(&[0, 7, 0, 7, 0, 1]);
    btf.kind("", KIND_PTR, 0, 6);
    btf.kind("btf_trace_it", KIND_TYPEDEF, 0, 7);
    btf.finish()
}

#[test]
fn fields_are_found_through_anonymous_and_named_members() {
    let btf = Btf::parse(sample()).expect("valid");
    assert_eq!(btf.field_offset("outer", "a"), Some(0));
    assert_eq!(btf.field_offset("outer", "hidden"), Some(8));
    assert_eq!(btf.field_offset("outer", "in.b"), Some(20));
    assert_eq!(btf.field_offset("outer", "missing"), None);
    assert_eq!(btf.field_offset("outer", "a.b"), None);
    assert_eq!(btf.field_offset("nowhere", "a"), None);
}

#[test]
fn enumerators_and_tracepoint_arguments_are_found() {
    let btf = Btf::parse(sample()).expect("valid");
    assert_eq!(btf.enumerator("reason", "DROP"), Some(12));
    assert_eq!(btf.enumerator("reason", "KEEP"), None);
    assert_eq!(btf.tracepoint_arguments("it"), Some(2));
    assert_eq!(btf.tracepoint_arguments("other"), None);
    assert!(btf.tracepoint_argument_is_pointer("it", 0));
    assert!(!btf.tracepoint_argument_is_pointer("it", 1));
    assert!(!btf.tracepoint_argument_is_pointer("it", 2));
}

#[test]
fn tracepoints_alone_keep_their_ids_and_nothing_else_a_name() {
    let btf = Btf::parse(sample()).expect("valid");
    let only = Btf::parse(btf.only_tracepoints().expect("small")).expect("valid");
    assert_eq!(only.types.len(), btf.types.len(), "the last type is the tracepoint's");
    let found = only.type_by_id(8).expect("as before");
    assert_eq!((found.kind, only.string(found.name)), (KIND_TYPEDEF, Some("btf_trace_it")));
    assert!(only.find(KIND_STRUCT, "outer").is_none());
}

#[test]
fn every_truncation_is_refused_or_answers_without_panic() {
    let whole = sample();
    for length in 0..whole.len() {
        if let Ok(btf) = Btf::parse(whole[..length].to_vec()) {
            let _offset = btf.field_offset("outer", "in.b");
            let _arguments = btf.tracepoint_arguments("it");
        }
    }
}

#[test]
fn a_typedef_of_itself_ends() {
    let mut btf = Writer::default();
    btf.kind("btf_trace_loop", KIND_TYPEDEF, 0, 1);
    let btf = Btf::parse(btf.finish()).expect("valid");
    assert_eq!(btf.tracepoint_arguments("loop"), None);
}

#[test]
fn a_structure_of_itself_many_times_over_is_searched_to_an_end() {
    let mut btf = Writer::default();
    btf.kind("itself", KIND_STRUCT, 4, 8);
    btf.words(&[0, 1, 0].repeat(4));
    let btf = Btf::parse(btf.finish()).expect("valid");
    assert_eq!(btf.field_offset("itself", "missing"), None);
}

proptest::proptest! {
    #[test]
    fn flipped_bytes_never_panic(position in 0_usize..400, value: u8) {
        let mut bytes = sample();
        let position = position % bytes.len();
        bytes[position] = value;
        if let Ok(btf) = Btf::parse(bytes) {
            let _offset = btf.field_offset("outer", "in.b");
            let _value = btf.enumerator("reason", "DROP");
            let _pointer = btf.tracepoint_argument_is_pointer("it", 0);
        }
    }
}
