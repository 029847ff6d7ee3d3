//! Settings of a program: from the command line, and from a TOML or YAML file where that is silent.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::parser::ValueSource;
use clap::{ArgMatches, FromArgMatches};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The settings of `matches`, whose command has an option `--config FILE`.
///
/// The file holds a table for each field of `S`, with the names of the options (`_` for `-`).
/// What the command line gives wins over the file, and the file over the defaults.
///
/// # Errors
/// Names the file and the section, key or value that is not known, with what is expected.
pub fn settings<S>(matches: &ArgMatches) -> Result<S>
where
    S: FromArgMatches + Serialize + DeserializeOwned,
{
    let settings = S::from_arg_matches(matches)?;
    let Some(path) = matches.get_one::<PathBuf>("config") else {
        return Ok(settings);
    };
    let at = || format!("in {}", path.display());
    let mut merged = serde_json::to_value(settings)?;
    for (section, table) in read_file(path)? {
        let keys = lookup(&mut merged, &section, "section").with_context(at)?;
        let Value::Object(table) = table else {
            bail!("{}: {section} is a section, got {table}", path.display());
        };
        for (key, value) in table {
            let known =
                lookup(keys, &key, "key").with_context(|| format!("{}, [{section}]", at()))?;
            let on_command_line = matches.try_contains_id(&key).is_ok()
                && matches.value_source(&key) == Some(ValueSource::CommandLine);
            if !on_command_line {
                *known = value;
            }
        }
    }
    serde_path_to_error::deserialize(merged).with_context(at)
}

/// The value of `name` in an object, or an error that lists what there is.
fn lookup<'a>(object: &'a mut Value, name: &str, what: &str) -> Result<&'a mut Value> {
    let names: Vec<String> = object
        .as_object()
        .map(|map| map.keys().cloned().collect())
        .unwrap_or_default();
    object.get_mut(name).with_context(|| {
        format!(
            "there is no {what} \"{name}\"; expected one of {}",
            names.join(", ")
        )
    })
}

fn read_file(path: &Path) -> Result<Map<String, Value>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the settings {}", path.display()))?;
    let parsed = match path.extension().and_then(|ending| ending.to_str()) {
        Some("toml") => toml::from_str(&text).map_err(anyhow::Error::from),
        Some("yaml" | "yml") => serde_yaml_ng::from_str(&text).map_err(anyhow::Error::from),
        _ => bail!(
            "{}: settings are .toml, .yaml or .yml files",
            path.display()
        ),
    };
    parsed.with_context(|| format!("{} is not what its ending says", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Args, CommandFactory, Parser};
    use serde::Deserialize;

    #[derive(Parser)]
    struct Cli {
        #[arg(long)]
        #[allow(dead_code, reason = "read by name")]
        config: Option<PathBuf>,
        #[command(flatten)]
        #[allow(dead_code, reason = "read by name")]
        settings: Settings,
    }

    #[derive(Args, Serialize, Deserialize, Debug, PartialEq)]
    struct Settings {
        #[command(flatten)]
        train: Train,
    }

    #[derive(Args, Serialize, Deserialize, Debug, PartialEq)]
    struct Train {
        #[arg(long, default_value_t = 1)]
        batch_size: u32,
        #[arg(long, default_value_t = 0.5)]
        lr: f64,
        #[arg(long, value_delimiter = ',')]
        seeds: Vec<u64>,
    }

    fn parse(ending: &str, file: &str, args: &[&str]) -> Result<Train> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join(format!("settings.{ending}"));
        std::fs::write(&path, file)?;
        let path = path.display().to_string();
        let args = ["test", "--config", &path]
            .into_iter()
            .chain(args.iter().copied());
        let settings: Settings = settings(&Cli::command().get_matches_from(args))?;
        Ok(settings.train)
    }

    #[test]
    fn command_line_wins_over_file_wins_over_default() {
        let expected = Train {
            batch_size: 7,
            lr: 0.5,
            seeds: vec![3],
        };
        let toml = "[train]\nbatch_size = 7\nseeds = [1, 2]";
        assert_eq!(parse("toml", toml, &["--seeds", "3"]).unwrap(), expected);
        let yaml = "train:\n  batch_size: 7\n  seeds: [1, 2]";
        assert_eq!(parse("yaml", yaml, &["--seeds", "3"]).unwrap(), expected);
        // A default given on the command line is given all the same.
        assert_eq!(
            parse("toml", toml, &["--batch-size", "1"])
                .unwrap()
                .batch_size,
            1
        );
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let message = |ending, text| format!("{:#}", parse(ending, text, &[]).unwrap_err());
        let unknown = message("toml", "[train]\nbatchsize = 7");
        assert!(
            unknown.contains("\"batchsize\"; expected one of batch_size, lr, seeds"),
            "{unknown}"
        );
        let section = message("toml", "[training]\nlr = 7");
        assert!(
            section.contains("\"training\"; expected one of train"),
            "{section}"
        );
        let kind = message("toml", "[train]\nbatch_size = \"many\"");
        assert!(
            kind.contains("train.batch_size") && kind.contains("many"),
            "{kind}"
        );
        assert!(message("toml", "[train").contains("is not what its ending says"));
        assert!(message("json", "{}").contains(".toml, .yaml or .yml"));
    }
}
