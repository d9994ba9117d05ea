//! Kernel signatures, read from the sources: the launchers follow from what the kernels themselves say.

/// An argument of a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// Its name in the source.
    pub name: String,
    /// Its type.
    pub ty: Type,
}

/// Type of an argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Type {
    /// Address of elements: the Rust element type (`T`, `f32`, `i32`, …), and whether the kernel only reads them.
    Pointer {
        /// Element type in Rust.
        element: &'static str,
        /// `const` in the source.
        read: bool,
    },
    /// `int`: a size or an index.
    Int,
    /// `uint32_t` or `unsigned`.
    Uint,
    /// `uint64_t`.
    Uint64,
    /// `float`.
    Float,
    /// A tensor map by value.
    Map,
}

/// An `extern "C"` kernel of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: String,
    /// Its arguments, in order.
    pub arguments: Vec<Argument>,
}

/// The kernels of a source, in their order. `place` names the file in errors.
///
/// # Errors
/// A signature that cannot be read, or a kernel without its `KERNEL_EXPORT`.
pub fn kernels(place: &str, text: &str) -> Result<Vec<Kernel>, String> {
    let text = without_comments(text);
    let mut found = Vec::new();
    for part in text.split("extern \"C\"").skip(1) {
        let kernel = signature(part).map_err(|e| format!("{place}: {e}"))?;
        if !text.contains(&format!("KERNEL_EXPORT({});", kernel.name)) {
            return Err(format!("{place}: {} lacks KERNEL_EXPORT({});", kernel.name, kernel.name));
        }
        found.push(kernel);
    }
    Ok(found)
}

/// The names of the kernels of a source of probes: those that it exports, and those that its macro `PROBE` makes.
pub fn names(text: &str) -> Vec<String> {
    let text = without_comments(text);
    let after = |mark: &str, end: char| -> Vec<String> {
        let found = text.split(mark).skip(1).filter_map(|rest| rest.split(end).next());
        found.map(|name| name.trim().to_string()).collect()
    };
    // Inside the macro the name is a parameter.
    let exported = after("\nKERNEL_EXPORT(", ')');
    exported.into_iter().chain(after("\nPROBE(", ',')).collect()
}

fn without_comments(text: &str) -> String {
    let lines = text.lines().map(|line| line.split_once("//").map_or(line, |(code, _)| code));
    let mut text = lines.collect::<Vec<_>>().join("\n");
    while let Some(start) = text.find("/*") {
        let end = text[start..].find("*/").map_or(text.len(), |at| start + at + 2);
        text.replace_range(start..end, " ");
    }
    text
}

/// `__global__ void __launch_bounds__(128) name(arguments) {…`
fn signature(text: &str) -> Result<Kernel, String> {
    let head = text.split('{').next().unwrap_or_default().trim();
    let (head, arguments) = match matching(head) {
        Some(at) => (&head[..at], &head[at + 1..head.rfind(')').unwrap_or(head.len())]),
        None => return Err(format!("cannot read the signature after extern \"C\": {}", first_line(head))),
    };
    let name = head.split(|c: char| !c.is_alphanumeric() && c != '_').rfind(|w| !w.is_empty()).unwrap_or_default();
    if !head.contains("__global__") || !head.contains("void") {
        return Err(format!("{name} is not `extern \"C\" __global__ void`"));
    }
    let arguments = arguments.split(',').map(|a| argument(name, a)).collect::<Result<Vec<_>, _>>()?;
    Ok(Kernel { name: name.to_string(), arguments })
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// Where the last parenthesis group of `head` opens.
fn matching(head: &str) -> Option<usize> {
    let mut depth = 0usize;
    for (at, c) in head.char_indices().rev() {
        match c {
            ')' => depth += 1,
            '(' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at);
                }
            }
            _ => {}
        }
    }
    None
}

fn argument(kernel: &str, text: &str) -> Result<Argument, String> {
    let spaced = text.replace('*', " * ");
    let words: Vec<&str> =
        spaced.split_whitespace().filter(|w| !["__restrict__", "__grid_constant__"].contains(w)).collect();
    let unknown =
        || format!("{kernel}: the launcher cannot pass `{}`", text.split_whitespace().collect::<Vec<_>>().join(" "));
    let Some((name, words)) = words.split_last() else { return Err(unknown()) };
    let read = words.first() == Some(&"const");
    let words = if read { &words[1..] } else { words };
    let ty = match words {
        [element, "*"] => Type::Pointer { element: pointee(element).ok_or_else(unknown)?, read },
        ["int"] => Type::Int,
        ["unsigned" | "uint32_t"] => Type::Uint,
        ["uint64_t"] => Type::Uint64,
        ["float"] => Type::Float,
        ["TensorMap" | "ptx::TensorMap"] => Type::Map,
        _ => return Err(unknown()),
    };
    Ok(Argument { name: name.to_string(), ty })
}

fn pointee(element: &str) -> Option<&'static str> {
    Some(match element {
        "T" => "T",
        "float" => "f32",
        "bf16" => "bf16",
        "int" | "int32_t" => "i32",
        "uint32_t" | "unsigned" => "u32",
        "uint64_t" => "u64",
        "uint8_t" => "u8",
        "int8_t" => "i8",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_read() {
        let text = "// extern \"C\" in a comment\nextern \"C\" __global__ void __launch_bounds__(128, 7)\n  \
            row(const T* x, float* mean, const int* at, int rows, uint64_t seed, float eps,\n \
            const __grid_constant__ TensorMap map) { body(); }\nKERNEL_EXPORT(row);\n";
        let found = kernels("a.cu", text).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].name, "row");
        let types: Vec<&Type> = found[0].arguments.iter().map(|a| &a.ty).collect();
        let pointer = |element, read| Type::Pointer { element, read };
        let want = [
            pointer("T", true),
            pointer("f32", false),
            pointer("i32", true),
            Type::Int,
            Type::Uint64,
            Type::Float,
            Type::Map,
        ];
        assert_eq!(types, want.iter().collect::<Vec<_>>());
    }

    #[test]
    fn what_cannot_be_launched_is_refused() {
        let of = |arguments: &str| {
            kernels("a.cu", &format!("extern \"C\" __global__ void k({arguments}) {{}}\nKERNEL_EXPORT(k);"))
        };
        assert!(of("double x").unwrap_err().contains("a.cu: k: the launcher cannot pass `double x`"));
        let unexported = kernels("a.cu", "extern \"C\" __global__ void k(int n) {}");
        assert!(unexported.unwrap_err().contains("lacks KERNEL_EXPORT"));
        assert!(kernels("a.cu", "extern \"C\" void k(int n) {}").unwrap_err().contains("__global__"));
    }
}
