//! Compiles `cuda/*.cu` with nvcc when the feature `cuda` is on, and links them in.
//!
//! Files named `*_sm90.cu` may use Hopper's own instructions and are compiled for sm_90a alone; the
//! others for sm_80 and sm_90, with PTX for later GPUs. Environment variables:
//!
//! - `CUDA_HOME` or `CUDA_PATH`: the CUDA toolkit, when it is not that of the nvcc on `PATH`.
//! - `ATTN_ARCHS`: such as `90`, to compile the portable kernels for these only and build faster.
//! - `NVCC_FLAGS`: more flags, such as `-lineinfo`.
//!
//! `$OUT_DIR/libattn.so` holds the same kernels for programs that are not Rust
//! (`scripts/build_kernels.sh` says where it is).

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, thread};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Compressed device code is a quarter as large.
const FLAGS: [&str; 5] = [
    "-std=c++20",
    "-O3",
    "-Xcompiler",
    "-fPIC",
    "-Xfatbin=-compress-all",
];

/// The first nvcc that compiles C++20 and sm_90a.
const MIN_CUDA: (u32, u32) = (12, 0);

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(error) = build_kernels() {
        for line in error.to_string().lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build_kernels() -> Result<()> {
    let sources = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../cuda");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed={}", sources.display());
    for name in ["CUDA_HOME", "CUDA_PATH", "ATTN_ARCHS", "NVCC_FLAGS"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let nvcc = find_nvcc()?;
    let (major, minor) = nvcc_version(&nvcc)?;

    let units = units(&sources, &out, &nvcc)?;
    compile_all(&units)?;
    let objects = || units.iter().map(|unit| &unit.object);
    let archive = out.join("libattn.a");
    // nvcc would add to an archive that exists.
    if archive.exists() {
        fs::remove_file(&archive)?;
    }
    run(Command::new(&nvcc)
        .arg("-lib")
        .args(objects())
        .arg("-o")
        .arg(&archive))?;
    run(Command::new(&nvcc)
        .args(["-shared", "-cudart", "static"])
        .args(objects())
        .arg("-o")
        .arg(out.join("libattn.so")))?;

    println!(
        "cargo::rustc-env=ATTN_CUDA_VERSION={}",
        1000 * major + 10 * minor
    );
    println!("cargo::rustc-link-search=native={}", out.display());
    if let Some(toolkit) = nvcc.ancestors().nth(2) {
        // The stubs stand in for libcuda.so where no driver is installed.
        for lib in ["lib64", "lib64/stubs"] {
            println!(
                "cargo::rustc-link-search=native={}",
                toolkit.join(lib).display()
            );
        }
    }
    println!("cargo::rustc-link-lib=static=attn");
    println!("cargo::rustc-link-lib=dylib=cudart");
    println!("cargo::rustc-link-lib=dylib=stdc++");
    Ok(())
}

fn find_nvcc() -> Result<PathBuf> {
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os);
    let folders = env::var_os("PATH").unwrap_or_default();
    (homes.map(|home| Path::new(&home).join("bin/nvcc")))
        .chain(env::split_paths(&folders).map(|folder| folder.join("nvcc")))
        .chain([PathBuf::from("/usr/local/cuda/bin/nvcc")])
        .find(|nvcc| nvcc.is_file())
        .ok_or_else(|| {
            "the feature `cuda` needs nvcc, which is neither in CUDA_HOME or CUDA_PATH, nor on PATH, nor in /usr/local/cuda; install the CUDA toolkit, or without root or GPU: scripts/cuda-toolkit.sh && source target/cuda/env.sh".into()
        })
}

/// The toolkit's version, of which `nvcc --version` says `release 13.0, V13.0.88`.
fn nvcc_version(nvcc: &Path) -> Result<(u32, u32)> {
    let text = run(Command::new(nvcc).arg("--version"))?;
    let version = text
        .split_once("release ")
        .and_then(|(_, rest)| rest.split_once(','))
        .and_then(|(version, _)| version.split_once('.'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .ok_or_else(|| format!("{} --version names no release: {text}", nvcc.display()))?;
    if version < MIN_CUDA {
        return Err(format!(
            "{} is of CUDA {}.{}, but the kernels need {}.{} or newer; set CUDA_HOME to a newer CUDA toolkit, or without root or GPU: scripts/cuda-toolkit.sh && source target/cuda/env.sh",
            nvcc.display(), version.0, version.1, MIN_CUDA.0, MIN_CUDA.1
        )
        .into());
    }
    Ok(version)
}

/// One file to compile.
struct Unit {
    object: PathBuf,
    command: Vec<String>,
    /// Length of the file and what it includes.
    len: usize,
    /// Hash of that and of the command.
    state: String,
}

fn units(sources: &Path, out: &Path, nvcc: &Path) -> Result<Vec<Unit>> {
    let more_flags = env::var("NVCC_FLAGS").unwrap_or_default();
    let mut units = Vec::new();
    for entry in fs::read_dir(sources)? {
        let source = entry?.path();
        if source.extension() != Some(OsStr::new("cu")) {
            continue;
        }
        let name = source.file_stem().unwrap_or_default().to_string_lossy();
        let object = out.join(format!("{name}.o"));
        let mut command = vec![nvcc.display().to_string()];
        command.extend(FLAGS.map(String::from));
        command.extend(architectures(&name));
        command.extend(more_flags.split_whitespace().map(String::from));
        command.extend(["-c".into(), source.display().to_string()]);
        command.extend(["-o".into(), object.display().to_string()]);
        let mut texts = BTreeMap::new();
        read_with_includes(&source, &mut texts)?;
        let mut hasher = DefaultHasher::new();
        (&command, &texts).hash(&mut hasher);
        units.push(Unit {
            object,
            command,
            len: texts.values().map(String::len).sum(),
            state: format!("{:x}", hasher.finish()),
        });
    }
    // The longest first, so that no core idles at the end.
    units.sort_by_key(|unit| Reverse(unit.len));
    Ok(units)
}

/// Adds the text of a file and of those it includes, each once.
fn read_with_includes(file: &Path, texts: &mut BTreeMap<PathBuf, String>) -> Result<()> {
    if texts.contains_key(file) {
        return Ok(());
    }
    let text = fs::read_to_string(file)?;
    let included: Vec<_> = (text.lines())
        .filter_map(|line| line.strip_prefix("#include \"")?.split_once('"'))
        .map(|(name, _)| file.with_file_name(name))
        .collect();
    texts.insert(file.to_path_buf(), text);
    (included.iter()).try_for_each(|file| read_with_includes(file, texts))
}

fn architectures(name: &str) -> Vec<String> {
    if name.ends_with("_sm90") {
        return vec!["-gencode=arch=compute_90a,code=sm_90a".into()];
    }
    let code = |arch: &str| format!("-gencode=arch=compute_{arch},code=sm_{arch}");
    match env::var("ATTN_ARCHS") {
        Ok(archs) => archs.split_whitespace().map(code).collect(),
        Err(_) => vec![
            code("80"),
            code("90"),
            "-gencode=arch=compute_90,code=compute_90".into(),
        ],
    }
}

/// Compiles what changed, on as many threads as cargo uses.
fn compile_all(units: &[Unit]) -> Result<()> {
    let jobs = env::var("NUM_JOBS")?.parse::<usize>()?;
    let queue = Mutex::new(units.iter());
    let worker = || -> Result<()> {
        loop {
            let Some(unit) = queue.lock().map_err(|e| e.to_string())?.next() else {
                return Ok(());
            };
            compile(unit)?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..jobs.min(units.len()))
            .map(|_| scope.spawn(worker))
            .collect();
        workers.into_iter().try_for_each(|worker| {
            worker
                .join()
                .unwrap_or_else(|_| Err("a thread panicked".into()))
        })
    })
}

fn compile(unit: &Unit) -> Result<()> {
    // Written after the object, so that an interrupted compilation is repeated.
    let stamp = unit.object.with_extension("stamp");
    if fs::read_to_string(&stamp).is_ok_and(|last| last == unit.state) {
        return Ok(());
    }
    run(Command::new(&unit.command[0]).args(&unit.command[1..]))?;
    fs::write(&stamp, &unit.state)?;
    Ok(())
}

/// Runs to the end and gives the standard output.
fn run(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .map_err(|error| format!("cannot run {command:?}: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?} failed ({}):\n{text}{errors}", output.status).into());
    }
    Ok(text.into_owned())
}
